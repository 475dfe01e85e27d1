-- The rows of the training table: one per car, with its rides (already aggregated by the authors)
-- and its repairs, counted up here. The targets are those of car_train.csv: the one in the
-- aggregated file differs a little.
WITH repairs AS (
  SELECT
    car_id,
    count(*) AS num_repairs,
    count(DISTINCT worker_id) AS num_workers,
    count(*) FILTER (work_type = 'repair') AS num_damages,
    count(*) FILTER (work_type = 'reparking') AS num_reparkings,
    avg(destroy_degree) AS mean_damage,
    max(destroy_degree) AS worst_damage,
    sum(work_duration) AS work_minutes,
    max(work_duration) AS longest_work_minutes,
    -- Dates such as 2020-2-30 exist only in the log: they count as missing here, the repair does not.
    date_diff(
      'day',
      min(try_strptime(fix_date, '%Y-%m-%d %H:%M')),
      max(try_strptime(fix_date, '%Y-%m-%d %H:%M'))
    ) AS days_of_repairs
  FROM fixes
  GROUP BY car_id
)
SELECT
  cars.car_id,
  cars.model,
  cars.car_type,
  cars.fuel_type,
  cars.car_rating,
  cars.year_to_start,
  cars.riders,
  cars.year_to_work,
  rides.mean_rating,
  rides.distance_sum,
  rides.rating_min,
  rides.speed_max,
  rides.user_ride_quality_median,
  rides.deviation_normal_count,
  rides.user_uniq,
  coalesce(repairs.num_repairs, 0) AS num_repairs,
  coalesce(repairs.num_workers, 0) AS num_workers,
  coalesce(repairs.num_damages, 0) AS num_damages,
  coalesce(repairs.num_reparkings, 0) AS num_reparkings,
  repairs.mean_damage,
  repairs.worst_damage,
  repairs.work_minutes,
  repairs.longest_work_minutes,
  repairs.days_of_repairs,
  cars.target_reg,
  cars.target_class
FROM cars
LEFT JOIN rides ON rides.car_id = cars.car_id
LEFT JOIN repairs ON repairs.car_id = cars.car_id
